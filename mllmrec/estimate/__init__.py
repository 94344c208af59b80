"""What a run will cost: tokens, memory, time, before it is started."""
