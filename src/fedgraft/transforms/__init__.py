"""What happens to replies between a client's answer and the coordinator's merge; each transform is one file, with both its halves."""
