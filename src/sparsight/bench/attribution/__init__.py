"""Attribution: which features of an image cause the logit of its class, judged by removing and adding them."""
