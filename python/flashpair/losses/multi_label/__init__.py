"""Contrastive losses of samples with several labels each; `flashpair.losses` names them."""
