"""What can be known of the files of a model and an adapter before anything heavy is imported."""
