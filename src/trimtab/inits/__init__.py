"""How the factors of a low-rank adapter start: one file an initialisation, found by what `init_lora_weights` says."""
