"""Mathematics on arrays: no parameters, no config objects, no mesh."""
