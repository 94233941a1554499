"""What a run would cost and what a model is made of, computed before anything is trained; prints nothing."""
