"""The reference OneTrans: one `forward` that defines the model for training, for the reference and for every export."""
