"""What was each training example worth to the model that was trained on it?"""

__version__ = "0.1.0"
