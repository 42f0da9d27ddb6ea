"""Drawing with reference images: strengths, mixing, and the references that users name."""
