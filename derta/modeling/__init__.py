"""Models: patched to train on packs, checked, adapted, tiled and offloaded."""
