"""What a student can learn from its teacher: one distillation term a class."""
