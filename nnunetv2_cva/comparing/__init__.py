"""Whether pretrained weights are worth it: fine-tuned beside training from scratch, on the user's own labelled data."""
