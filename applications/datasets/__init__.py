"""Sets of images in classes, for few-shot learning."""
