"""What rotary frequencies do in a model: usage, offset heads, exact theory."""
