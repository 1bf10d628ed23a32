"""Generation at constant cost: sequences that read and write, one state each."""
