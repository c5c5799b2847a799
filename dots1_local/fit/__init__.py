"""Files made for a machine: types chosen for quality and for speed where each tensor will live."""
