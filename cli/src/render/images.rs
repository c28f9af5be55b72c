//! Container images.

use hydrant_api::{Image, LayerFill, TracedLayer};

use super::{bytes, number, percent, table};
use crate::output::clean_line;

/// One line each.
pub fn images(images: &[Image]) -> String {
    if images.is_empty() {
        return "no images\n".into();
    }
    let row = |image: &Image| {
        let digest = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
        let present = percent(image.present_bytes, image.segment_bytes);
        vec![
            image.reference.clone(),
            digest.get(..12).unwrap_or(digest).to_owned(),
            number(image.layers),
            bytes(image.bytes),
            format!("{} ({present})", bytes(image.present_bytes)),
            bytes(image.traced_bytes),
            image.mounts.join(" "),
        ]
    };
    let headings = ["IMAGE", "DIGEST", ">LAYERS", ">SIZE", ">PRESENT", ">TRACED", "MOUNTED AT"];
    let mut out = table(&headings, images.iter().map(row));
    for image in images {
        for refuted in &image.refuted {
            out.push_str(&clean_line(&format!("{}: {refuted}", image.reference)));
            out.push('\n');
        }
    }
    out
}

/// What is fetched first of each layer, and its files.
pub fn traces(layers: &[TracedLayer]) -> String {
    let mut out = String::new();
    for TracedLayer { layer, bytes: size, files } in layers {
        out.push_str(&format!("{}: {}\n", clean_line(layer), bytes(*size)));
        for file in files {
            out.push_str(&format!("  {}\n", clean_line(file)));
        }
    }
    out
}

/// What comes of layers by itself.
pub fn fills(layers: &[LayerFill]) -> String {
    if layers.is_empty() {
        return String::new();
    }
    let row = |fill: &LayerFill| {
        let layer = fill.layer.strip_prefix("sha256:").unwrap_or(&fill.layer);
        let present = percent(fill.present_bytes, fill.segment_bytes);
        vec![
            layer.get(..12).unwrap_or(layer).to_owned(),
            fill.state.clone(),
            format!("{} ({present})", bytes(fill.present_bytes)),
            format!("{} of {}", bytes(fill.replayed_bytes), bytes(fill.traced_bytes)),
            fill.trouble.clone().unwrap_or_default(),
        ]
    };
    table(&["LAYER", "FILL", ">PRESENT", ">REPLAYED", ""], layers.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_and_fills() {
        let layer = format!("sha256:{}", "0123456789ab".repeat(6));
        let files = vec!["bin/sh".into(), "lib/c.so".into()];
        let traced = TracedLayer { layer: layer.clone(), bytes: 3 << 20, files };
        let expected = format!("{layer}: 3.0 MiB\n  bin/sh\n  lib/c.so\n");
        assert_eq!(traces(&[traced]), expected);
        let fill = LayerFill {
            layer,
            state: "filling".into(),
            trouble: None,
            present_bytes: 1 << 20,
            segment_bytes: 4 << 20,
            traced_bytes: 3 << 20,
            replayed_bytes: 1 << 20,
        };
        let expected = r"
LAYER         FILL            PRESENT            REPLAYED
0123456789ab  filling  1.0 MiB (25 %)  1.0 MiB of 3.0 MiB
";
        assert_eq!(fills(&[fill]), expected.trim_start());
        assert_eq!(fills(&[]), "");
    }

    #[test]
    fn a_list() {
        let image = Image {
            reference: "docker.io/library/busybox:latest".into(),
            digest: format!("sha256:{}", "0123456789ab".repeat(6)),
            manifest: String::new(),
            config: String::new(),
            layers: 1,
            files: 400,
            bytes: 1 << 20,
            present_bytes: 1 << 20,
            segment_bytes: 2 << 20,
            traced_bytes: 1 << 20,
            unproved: 1,
            refuted: vec!["the layer is another".into()],
            pulled_ms: 0,
            mounts: vec!["/mnt".into()],
        };
        let expected = r"
IMAGE                             DIGEST        LAYERS     SIZE         PRESENT   TRACED  MOUNTED AT
docker.io/library/busybox:latest  0123456789ab       1  1.0 MiB  1.0 MiB (50 %)  1.0 MiB  /mnt
docker.io/library/busybox:latest: the layer is another
";
        assert_eq!(images(&[image]), expected.trim_start());
        assert_eq!(images(&[]), "no images\n");
    }
}
