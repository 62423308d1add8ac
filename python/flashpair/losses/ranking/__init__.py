"""Losses of scores and preferences; `flashpair.losses` names them."""
