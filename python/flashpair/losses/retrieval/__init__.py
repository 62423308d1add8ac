"""Losses of queries and documents, by sentence-transformers' names; `flashpair.losses` names them."""
