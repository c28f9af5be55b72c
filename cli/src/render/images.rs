//! Container images.

use hydrant_api::{Image, LayerFill, TracedLayer};

use super::{bytes, number, or_dash, percent, table};
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

/// What is fetched first of layers, and what lies there.
pub fn traces(layers: &[TracedLayer]) -> String {
    let mut out = String::new();
    for TracedLayer { layer, bytes: size, files } in layers.iter().filter(|of| of.bytes > 0) {
        out.push_str(&format!("{}: {}\n", clean_line(layer), bytes(*size)));
        for file in files {
            out.push_str(&format!("  {}\n", clean_line(file)));
        }
    }
    if out.is_empty() {
        out.push_str("nothing is recorded\n");
    }
    out
}

/// What comes of layers by itself. Of those that are all there, how many these are.
pub fn fills(layers: &[LayerFill]) -> String {
    let is_all_there = |fill: &&LayerFill| fill.present_bytes >= fill.segment_bytes;
    let (whole, rest): (Vec<_>, Vec<_>) = layers.iter().partition(is_all_there);
    let all_there = match whole.len() as u64 {
        0 => String::new(),
        1 => "1 layer that was filled is all there\n".into(),
        n => format!("{} layers that were filled are all there\n", number(n)),
    };
    if rest.is_empty() {
        return all_there;
    }
    let row = |fill: &LayerFill| {
        let present = percent(fill.present_bytes, fill.segment_bytes);
        vec![
            short(&fill.layer),
            fill.state.clone(),
            format!("{} ({present})", bytes(fill.present_bytes)),
            format!("{} of {}", bytes(fill.replayed_bytes), bytes(fill.traced_bytes)),
            or_dash(fill.images.first()),
        ]
    };
    let mut text = table(
        &["LAYER", "FILL", ">PRESENT", ">REPLAYED", "IMAGE"],
        rest.iter().map(|fill| row(fill)),
    );
    for fill in &rest {
        if let Some(trouble) = &fill.trouble {
            text.push_str(&format!("trouble: {}: {}\n", short(&fill.layer), clean_line(trouble)));
        }
    }
    text + &all_there
}

/// The beginning of a digest.
fn short(layer: &str) -> String {
    let layer = layer.strip_prefix("sha256:").unwrap_or(layer);
    clean_line(layer.get(..12).unwrap_or(layer))
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
        assert_eq!(traces(std::slice::from_ref(&traced)), expected);
        assert_eq!(traces(&[TracedLayer { bytes: 0, ..traced }]), "nothing is recorded\n");
        let fill = LayerFill {
            layer,
            state: "filling".into(),
            trouble: None,
            present_bytes: 1 << 20,
            segment_bytes: 4 << 20,
            traced_bytes: 3 << 20,
            replayed_bytes: 1 << 20,
            images: vec!["localhost/a:1".into()],
        };
        let waits = LayerFill {
            layer: "sha256:fedcba987654321".into(),
            state: "waiting".into(),
            trouble: Some("no route".into()),
            images: Vec::new(),
            ..fill.clone()
        };
        let whole = LayerFill { state: "done".into(), present_bytes: 4 << 20, ..fill.clone() };
        let expected = r"
LAYER         FILL            PRESENT            REPLAYED  IMAGE
0123456789ab  filling  1.0 MiB (25 %)  1.0 MiB of 3.0 MiB  localhost/a:1
fedcba987654  waiting  1.0 MiB (25 %)  1.0 MiB of 3.0 MiB  -
trouble: fedcba987654: no route
1 layer that was filled is all there
";
        assert_eq!(fills(&[fill, waits, whole.clone()]), expected.trim_start());
        assert_eq!(fills(&[whole.clone(), whole]), "2 layers that were filled are all there\n");
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
