"""Where a model lives: bytes and speeds predicted of a placement, and the best one found."""
