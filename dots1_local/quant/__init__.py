"""How weights are stored: types, encoders, importance, and the choice of a type per tensor."""
