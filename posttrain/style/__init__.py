"""Style references: K2 draws what the text asks in the style of images that it is shown."""
