"""The reference OneTrans: one `forward` that defines the model for training, for the gold and for every export."""
