"""Looking at what a network has learned: its features of any image, what matches what, and whether a training learns."""
