"""Which experts a client holds: criteria, assignment under budgets, placements."""
