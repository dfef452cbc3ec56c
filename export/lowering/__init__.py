"""From modules to the forms that targets take."""
