"""What a run will take: FLOPs, memory, time and cost, before it starts."""
