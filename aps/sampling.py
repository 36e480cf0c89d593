@strategy("asymmetric")
@strategy("random")
@strategy("full")
