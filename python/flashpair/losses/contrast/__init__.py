"""Contrastive losses of views, towers and queues; `flashpair.losses` names them."""
