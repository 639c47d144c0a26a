"""The base model as both sides see it: how it is loaded, which of its weights are linear, how a layout is made."""
