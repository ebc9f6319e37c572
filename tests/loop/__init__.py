"""The loop: each round against its formula, resumed after every failure, gates, anchors, removal of old rounds."""
