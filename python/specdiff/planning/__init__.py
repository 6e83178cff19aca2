"""Planning: how many tokens to draft in how many steps, by costs measured on the machine."""
