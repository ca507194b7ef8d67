"""Tools that know nothing of distillation: registry, affine maps, random states, precision, shared weights."""
