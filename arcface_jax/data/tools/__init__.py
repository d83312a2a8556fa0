"""What scripts/data.py does to training sets: look, pack, split, merge, align, make pairs."""
