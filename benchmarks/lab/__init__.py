"""A real model, a real server and seeded load: what tests, benchmarks and examples run on."""
