"""The same gradients with less work: packs, shared beginnings, logits only where there is a label."""
