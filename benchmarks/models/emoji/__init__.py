"""Text-to-image and text-to-video models of emoji: data, training, evaluation, and the pipelines that are shipped."""
