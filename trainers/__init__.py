"""Recipes: the classes that ``nnUNetv2_train -tr`` finds. nnU-Net imports every module of this folder by itself."""
