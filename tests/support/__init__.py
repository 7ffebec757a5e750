"""What tests, demo and benches share: real nodes, real peers, hostile peers."""
