"""Training that is right on every tf.distribute strategy; knows no architecture."""
