"""How scenes become pixels: `draw` a scene, `settings` and `things` it is made of, `gallery` for many."""
