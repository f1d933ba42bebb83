"""Does it adapt better? Every method on the same tasks, rates chosen on held-back data, differences with intervals."""
