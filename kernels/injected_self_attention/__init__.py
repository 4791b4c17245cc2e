"""`moma::InjectedSelfAttention`: self-attention plus masked attention to a reference's keys and values."""
