"""The chain: levels, wavelets, noise, schedules, and the loop that samples."""
