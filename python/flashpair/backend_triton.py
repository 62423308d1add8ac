"""Backend `triton`. Stub until the extension is wired."""


def unavailable():
    return ["not built"]
