"""Backend `cpu`: C++, vectorised and threaded. Stub until the extension is wired."""


def unavailable():
    return ["not built"]
