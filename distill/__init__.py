"""Stage 2, distillation: one or several students learn from a frozen teacher."""
