"""The ways to reach clients behind `ask`: in process, or over Flower."""
