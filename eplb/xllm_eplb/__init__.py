"""Dynamic load balancing of MoE experts: which device holds which expert, and when that changes."""
