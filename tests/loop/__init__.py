"""The loop: each round against its formula, resumed after every failure, gates, anchors, what is kept."""
