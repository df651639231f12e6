"""All kernel ABI: thin, raises OSError, holds no policy and logs nothing."""
