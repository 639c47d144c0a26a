"""The secure sum: keys, shares, masks, and the state of one member, as pure functions."""
