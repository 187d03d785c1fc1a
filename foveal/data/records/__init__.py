"""Records of consumed and of bad samples, and their audit."""
